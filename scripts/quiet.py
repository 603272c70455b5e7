"""Importing this first holds back what a reader of the console cannot act on.

That is: a note on an optional kernel that bitsandbytes writes while it is imported (PEFT imports it), notes
of transformers to itself about arguments that will be renamed, and the bars of steps that take a second.
Downloads from the hub keep theirs.
"""

import logging
import warnings

import datasets
import huggingface_hub.utils
import transformers

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
huggingface_hub.utils.enable_progress_bars()
