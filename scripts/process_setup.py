"""Importing this first sets up the process: threads that wait without spinning, and a quiet console.

On a machine that has other work to do, OpenMP's spinning threads made the demo five times slower. OpenMP reads
the setting when torch is imported.

What is kept from the console is what a reader cannot act on: a note on an optional kernel that bitsandbytes
writes while it is imported (PEFT imports it), DeepSpeed's warnings, of which the first is that there is no GPU,
notes of transformers to itself about arguments that will be renamed, and the bars of steps that take a second.
Downloads from the hub keep theirs.
"""

import logging
import os
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import datasets
import huggingface_hub.utils
import transformers

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# A filter, since DeepSpeed sets its own level when it is imported.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
huggingface_hub.utils.enable_progress_bars()
