"""The words that captions of Tiny ImageNet's photographs are made of: names, kinds and places of its 200 classes.

Names are those of the data set TinyImageNet, the synset's own (words.txt) and common ones. Kinds follow WordNet's parents,
in everyday words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from oodprompt.datasets.tiny_imagenet import class_names

# More names of a class, beside the first ones of words.txt.
NAMES: dict[str, list[str]] = {
    "n01629819": ["fire salamander", "salamander"],
    "n01641577": ["American bullfrog", "frog"],
    "n01698640": ["alligator"],
    "n01742172": ["snake"],
    "n01774384": ["southern black widow", "black widow spider"],
    "n01983481": ["lobster"],
    "n02002724": ["stork"],
    "n02056570": ["penguin"],
    "n02123045": ["tabby cat"],
    "n02132136": ["bear"],
    "n02165456": ["ladybird"],
    "n02231487": ["stick insect"],
    "n02236044": ["praying mantis"],
    "n02279972": ["monarch butterfly"],
    "n02281406": ["yellow butterfly"],
    "n02395406": ["pig"],
    "n02415577": ["bighorn sheep", "sheep"],
    "n02437312": ["camel"],
    "n02504458": ["elephant", "African bush elephant"],
    "n02509815": ["red panda"],
    "n02793495": ["farm", "a field with a barn"],
    "n02788148": ["handrail", "railing", "baluster handrail"],
    "n02814533": ["station wagon"],
    "n02814860": ["lighthouse"],
    "n02892201": ["plaque", "memorial plaque", "brass memorial plaque"],
    "n02917067": ["high-speed train"],
    "n02977058": ["automated teller machine"],
    "n03014705": ["storage chest"],
    "n03089624": ["candy store"],
    "n03100240": ["convertible car"],
    "n03126707": ["construction crane"],
    "n03393912": ["railroad car"],
    "n03424325": ["gas mask"],
    "n03599486": ["rickshaw"],
    "n03706229": ["compass"],
    "n03804744": ["metal nail"],
    "n03854065": ["pipe organ"],
    "n03902125": ["payphone"],
    "n03983396": ["soda bottle"],
    "n04008634": ["missile"],
    "n04067472": ["fishing reel", "fishing casting reel"],
    "n04371430": ["swim trunks", "swimming shorts"],
    "n04399382": ["teddy bear"],
    "n04417672": ["thatched roof"],
    "n07579787": ["plate of food"],
    "n07615774": ["popsicle"],
    "n07875152": ["pot pie"],
    "n09193705": ["mountain", "snowy mountain"],
    "n09332890": ["lake", "lakeshore", "the shore of a lake"],
    "n09428293": ["beach", "the sea", "the ocean"],
    "n09246464": ["rocky cliff", "rocks"],
    "n09256479": ["reef", "the bottom of the sea"],
}
# Second names that mean something else to most people; they are left out.
MISLEADING = {"drop", "bullet", "bath", "board", "hopper", "roach", "taper", "cask", "mini", "remote", "rocker", "shades",
              "panda", "wagon", "drop-off", "dike"}  # fmt: skip

KINDS: dict[str, str] = {
    "dog": "n02085620 n02094433 n02099601 n02099712 n02106662 n02113799",
    "cat": "n02123045 n02123394 n02124075",
    "wild cat": "n02125311 n02129165",
    "monkey": "n02480495 n02481823 n02486410",
    "farm animal": "n02395406 n02403003 n02415577",
    "mammal": "n01882714 n02074367 n02125311 n02129165 n02132136 n02364673 n02395406 n02403003 n02410509 n02415577 "
    "n02423022 n02437312 n02480495 n02481823 n02486410 n02504458 n02509815",
    "bird": "n01855672 n02002724 n02056570 n02058221",
    "fish": "n01443537",
    "amphibian": "n01629819 n01641577 n01644900",
    "reptile": "n01698640 n01742172",
    "spider": "n01774384 n01774750",
    "insect": "n02165456 n02190166 n02206856 n02226429 n02231487 n02233338 n02236044 n02268443 n02279972 n02281406",
    "butterfly": "n02279972 n02281406",
    "sea animal": "n01910747 n01917289 n01950731 n01983481 n01984695 n02074367 n02321529",
    "car": "n02814533 n03100240 n03670208 n04285008",
    "bus": "n04146614 n04487081",
    "train": "n02917067 n03393912",
    "van": "n03796401 n03977966",
    "boat": "n03447447 n03662601",
    "vehicle": "n02814533 n02917067 n03100240 n03393912 n03444034 n03447447 n03599486 n03662601 n03670208 n03796401 "
    "n03977966 n04146614 n04285008 n04465501 n04487081",
    "bridge": "n04311004 n04366367 n04532670",
    "tower": "n02814860 n03837869 n04562935",
    "building": "n02793495 n02814860 n03042490 n04417672 n04486054 n04562935",
    "shop": "n02791270 n02927161 n03089624",
    "furniture": "n03014705 n03179701 n03201208 n04099969 n03637318",
    "clothes": "n02669723 n02730930 n02837789 n02883205 n02963159 n03404251 n03617480 n03763968 n03770439 n03980874 "
    "n04133789 n04254777 n04259630 n04371430 n04532106",
    "bottle": "n02823428 n03937543 n03983396",
    "machine": "n02977058 n03649909 n03891332 n04179913 n04501370 n03902125",
    "tool": "n02906734 n03970156 n04376876 n04597913 n03255030",
    "instrument": "n03838899 n03854065 n03250847",
    "ball": "n02802426 n04118538 n04540053",
    "food": "n07579787 n07583066 n07614500 n07615774 n07695742 n07711569 n07715103 n07720875 n07734744 n07747607 n07749582 "
    "n07753592 n07768694 n07871810 n07873807 n07875152 n07920052",
    "fruit": "n07747607 n07749582 n07753592 n07768694 n12267677",
    "vegetable": "n07711569 n07715103 n07720875 n07734744",
    "dessert": "n07614500 n07615774",
    "mountains": "n09193705 n09246464",
    "water": "n09256479 n09332890 n09428293",
    "land": "n02793495 n09193705 n09246464",
    "coast": "n09428293 n09332890",
}
# Kinds that contain other kinds.
WIDER: dict[str, tuple[str, ...]] = {
    "mammal": ("dog", "cat"),
    "animal": ("dog", "cat", "mammal", "bird", "fish", "amphibian", "reptile", "spider", "insect", "sea animal"),
    "place": ("land", "water"),
}
MORE_ANIMALS = "n01768244 n01770393 n01784675 n01944390 n01945685"
PLACES = ("n02793495", "n09193705", "n09246464", "n09256479", "n09332890", "n09428293")


def names_of(root: Path, wnids: Sequence[str]) -> dict[str, list[str]]:
    """The names of each class by its WordNet id; the data set's name comes first. ``root`` has words.txt."""
    of_data_set = class_names(root, list(wnids))
    words = (root / "words.txt").read_text(encoding="utf-8")
    known = dict(line.split("\t", 1) for line in words.splitlines())
    found = {}
    for wnid in wnids:
        own = [name.strip() for name in known[wnid].split(",")]
        latin = [
            name for name in own[1:] if name.count(" ") == 1 and name.split()[0].istitle()
        ]  # a species, most often
        own = [own[0], *(name for name in own[1:3] if name not in latin)]
        kept = [own[0], *(name for name in own[1:] if name not in MISLEADING)]
        found[wnid] = list(dict.fromkeys([of_data_set[wnid], *kept, *NAMES.get(wnid, [])]))
    return found


def kinds() -> dict[str, set[str]]:
    """The classes of each kind, by their WordNet ids."""
    found = {kind: set(members.split()) for kind, members in KINDS.items()}
    for kind, narrower in WIDER.items():
        found[kind] = found.get(kind, set()).union(*(found[one] for one in narrower))
    found["animal"] |= set(MORE_ANIMALS.split())
    return found
