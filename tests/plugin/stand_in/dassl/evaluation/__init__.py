from collections import OrderedDict


class Classification:
    def __init__(self, cfg, lab2cname=None):
        self.reset()

    def reset(self):
        self.correct = self.total = 0

    def process(self, mo, gt):
        self.correct, self.total = self.correct + int((mo.argmax(1) == gt).sum()), self.total + len(gt)

    def evaluate(self):
        accuracy = 100.0 * self.correct / self.total
        print(f"=> result\n* accuracy: {accuracy:.1f}%")
        return OrderedDict(accuracy=accuracy)
