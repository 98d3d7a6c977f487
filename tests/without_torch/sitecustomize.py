"""Commands under test run as the README's installation has them, without torch, where parity tests brought it:
transformers would import it, which takes seconds."""

from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda _, name, *rest: None if name == "torch" else find_spec(name, *rest))
