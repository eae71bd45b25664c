"""The audit: what would go wrong with a data set, or does with a trained model, as one page (docs/audit.md)."""
