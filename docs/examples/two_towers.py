"""An image encoder of timm beside a text encoder of transformers, aligned by ridge regression on captioned images.

python train.py --import docs/examples/two_towers.py --backbone TwoTowers MODEL.BACKBONE.PATH pairs.csv --trainer CoOp ...

The csv file has the columns image and caption. Paths are relative to its folder.
"""

from pathlib import Path

import pandas
import timm
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoModel, AutoTokenizer

from oodprompt import contracts as ood

IMAGE, TEXT = "vit_small_patch16_224.dino", "sentence-transformers/all-MiniLM-L6-v2"
SIZE, MEAN, STD = (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS = [
    v2.Resize(SIZE[0]),
    v2.CenterCrop(SIZE),
    v2.ToImage(),
    v2.ToDtype(torch.float32, True),
    v2.Normalize(MEAN, STD),
]


@ood.BACKBONE_REGISTRY.register()
class TwoTowers(ood.BackboneSource):
    """DINO's ViT-S/16 beside MiniLM, aligned on the pairs of a csv file."""

    preprocessing = ood.Preprocessing(SIZE, MEAN, STD)

    def load(self, path):
        image = timm.create_model(IMAGE, pretrained=True, num_classes=0).eval()
        text, own = AutoModel.from_pretrained(TEXT).eval(), AutoTokenizer.from_pretrained(TEXT)
        pad, full = own.pad_token_id, {"padding": "max_length", "truncation": True, "return_tensors": "pt"}

        def encode_text(ids):  # the mean over tokens that are no padding
            mask = (ids != pad).long()
            states = text(input_ids=ids, attention_mask=mask).last_hidden_state
            return (states * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)

        tokenizer = ood.LibraryTokenizer(
            lambda texts, length: own(texts, max_length=length, **full).input_ids,
            lambda words: own(words, add_special_tokens=False).input_ids,
            context_length=64,
        )
        pairs, folder, pixels = pandas.read_csv(path), Path(path).parent, v2.Compose(PIXELS)
        with torch.no_grad():
            x = torch.cat([image(pixels(Image.open(folder / file).convert("RGB"))[None]) for file in pairs.image])
            t = encode_text(tokenizer(list(pairs.caption)))
        image, embedding, width = torch.nn.Sequential(image, ood.align(x, t)), text.get_input_embeddings(), t.shape[1]
        return ood.GeneralCLIP(
            ood.Towers(image, text, encode_text, embedding, tokenizer, self.preprocessing, 50, width, pad)
        )
