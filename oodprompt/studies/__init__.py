"""The controlled evaluation of RaVL's discovery, and its baselines."""
