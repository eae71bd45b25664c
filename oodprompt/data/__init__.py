"""Images: data sets, transforms, the order of images, loaders, and random numbers that depend on a seed alone."""
