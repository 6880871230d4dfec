"""A plugin that the host sends is run here, and what it leaves in its context sent back with its result."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def run_plugin(plugin: Any, context: Any) -> Any:
    """The outcome: ``result``, ``properties``, ``arguments``. A coroutine that ends in it, where ``execute`` is one."""
    instance = plugin() if isinstance(plugin, type) else plugin
    result = instance.execute(context)
    return _awaited(result, context) if hasattr(type(result), "__await__") else _outcome(result, context)


async def _awaited(result: Any, context: Any) -> dict[str, Any]:
    return _outcome(await result, context)


def _outcome(result: Any, context: Any) -> dict[str, Any]:
    for name, kind in (("properties", dict), ("arguments", list)):
        if not isinstance(getattr(context, name), kind):
            raise TypeError(
                f"the plugin has put something in the place of its context's {name} that is no {kind.__name__}"
            )
    return {"result": result, "properties": context.properties, "arguments": context.arguments}
