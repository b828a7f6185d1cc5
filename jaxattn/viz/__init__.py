"""What a notebook shows: cards of objects, and pictures, which need matplotlib and are imported when used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
