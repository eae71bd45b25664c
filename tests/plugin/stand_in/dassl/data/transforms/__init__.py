from torchvision import transforms as T


def build_transform(cfg, is_train=True):
    size, interpolation = tuple(cfg.INPUT.SIZE), T.InterpolationMode(cfg.INPUT.INTERPOLATION)
    names = cfg.INPUT.TRANSFORMS
    if is_train:
        steps = [T.Resize(size, interpolation=interpolation)]
        steps += [T.RandomHorizontalFlip()] if "random_flip" in names else []
    else:
        steps = [T.Resize(max(size), interpolation=interpolation), T.CenterCrop(size)]
    steps.append(T.ToTensor())
    steps += [T.Normalize(cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)] if "normalize" in names else []
    return T.Compose(steps)
