"""``python -I -S <this file> root|zygote CONTROL_FD HOST_PIDFD``: first builds the root, then becomes the zygote in it.

Two stages with an exec between them, so that the interpreter which forks children was started inside the private
root: its paths are right, and its memory holds nothing of the host. The file is named, not its folder, for which the
interpreter would import runpy (4 ms a stage); and it is short, because a script is compiled anew each time.
"""

import gc
import sys


def main() -> None:
    gc.disable()  # importing leaves no garbage, but would be searched for it 14 times: 1 ms; see zygote.settle
    sys.path.insert(0, __file__.rpartition("/")[0].rpartition("/")[0])
    stage, control, host = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if stage == "root":
        from pihost import root

        root.enter(control, host)
    else:
        from pihost import zygote

        zygote.main(control, host)


if __name__ == "__main__":
    main()
