from dassl.utils.torchtools import load_checkpoint, resume_from_checkpoint, save_checkpoint  # noqa: F401


class Registry:
    def __init__(self, name):
        self.name, self._obj_map = name, {}

    def register(self, obj=None, force=False):
        def add(obj):
            if obj.__name__ in self._obj_map and not force:
                raise KeyError(f"{obj.__name__} was already registered")
            self._obj_map[obj.__name__] = obj
            return obj

        return add if obj is None else add(obj)

    def get(self, name):
        return self._obj_map[name]

    def registered_names(self):
        return list(self._obj_map)
