"""This library's version, in a module that imports nothing: the build and checkpoints read it, too."""

__version__ = "0.1.0"
