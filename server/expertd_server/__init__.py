"""The server process: HTTP in, tokens out. Asynchronous; knows OpenAI, knows no tensors, never imports torch."""

from importlib.metadata import version

__version__ = version("expertd")
