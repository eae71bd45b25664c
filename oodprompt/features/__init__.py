"""Image features of whole splits: computed once, kept, and encoded."""
