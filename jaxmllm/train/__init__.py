"""Training. The package can be called: `jaxmllm.train(config)` is `jaxmllm.train.loop.train(config)`.

An imported subpackage takes its name in the package above, so that the function of that name would be hidden by the first
`import jaxmllm.train.config`.
"""

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from jaxmllm.train.loop import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
