"""An application in a container: python -m app [PROTECTION TO DO WITHOUT...]. Says what held while it ran a stranger's code."""

import sys

from pisupervisor import ProcessIsolator

with ProcessIsolator.create(degrade=tuple(sys.argv[1:])) as isolator:
    print("answer:", isolator.run_source("6 * 7").value)
    for name, entry in isolator.applied.items():
        if entry.asked not in (None, False, ()):
            print(f"{name}: {'holds' if entry.holds else 'does not hold'}, {entry.how}")
