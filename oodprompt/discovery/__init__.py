"""Discovery of spurious features by clustering regions (RaVL), and the methods it is compared with."""
