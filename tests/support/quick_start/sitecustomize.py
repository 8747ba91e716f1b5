"""Python runs this at the start of every worker that tests launch: torch's compiler is not imported.

The first optimizer that a process makes would import it, which takes two seconds of processor time and more, only to
keep it away from that optimizer's methods. Nothing here is compiled. Not needed for anything but the tests' speed.
"""

import sys
import types

markers = types.ModuleType("torch._compile")
markers._disable_dynamo = lambda function=None, recursive=True: function or (lambda decorated: decorated)  # type: ignore[attr-defined]
compiler = types.ModuleType("torch._dynamo")
compiler.graph_break = lambda: None  # type: ignore[attr-defined]
compiler.trace_rules = types.SimpleNamespace(clear_lru_cache=lambda: None)  # type: ignore[attr-defined]
sys.modules.update({module.__name__: module for module in (markers, compiler)})
