"""The part of Dassl that ``oodprompt.plugin`` touches, in words of our own, with what is broken in it left in.

Names, signatures and order of calls are those of Dassl 0.6.3, so that tests need no download.
"""

__version__ = "0.6.3"
