"""Sources of groups (TRAINER.GROUPS): which value of an attribute each image has. docs/groups.md compares them.

| name                                 | file            | the value of an image is                                          |
|--------------------------------------|-----------------|-------------------------------------------------------------------|
| true, pseudo, audit, regions         | known.py        | a label, what zero-shot CLIP sees, a region that discovery found  |
| csv                                  | csv_column.py   | in a column of a csv file                                         |
| errors, eiil                         | first_model.py  | whether a first model errs, or an environment where it does       |
| clusters, spare                      | class_clusters.py | its cluster among the images of its class                       |
| ssa                                  | few_labels.py   | what a predictor says that a few labels train                     |
| denoised                             | denoised.py     | what zero-shot CLIP sees, corrected by a predictor                |

A source of your own is a ``GroupSource`` in a file that ``--import`` names (CONTRIBUTING.md).
"""

from oodprompt.methods.sources import class_clusters, csv_column, denoised, few_labels, first_model, known  # noqa: F401
