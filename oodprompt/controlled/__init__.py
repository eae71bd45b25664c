"""The controlled evaluation of RaVL: images with a planted spurious correlation, and what is measured there."""
