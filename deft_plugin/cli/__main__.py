"""`python -m deft_plugin.cli`."""

from . import main

main()
