"""The editing methods, one per file. Importing this package makes all of them known to the command line."""

from .base import REGISTRY, Editor, register
from .repair import Repair

__all__ = ["REGISTRY", "Editor", "Repair", "register"]
