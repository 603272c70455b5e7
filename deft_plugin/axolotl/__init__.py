"""Axolotl: `plugins: [deft_plugin.axolotl.DEFTPlugin]` trains with DEFT."""

try:
    from .plugin import DEFTPlugin
except ImportError as error:
    # Axolotl only logs a plugin's ImportError and would go on to train with its own loss.
    raise RuntimeError(
        f"deft_plugin.axolotl cannot be imported ({error}). Install the versions it was tested with, "
        'from a checkout pip install -c constraints/axolotl.txt -e ".[axolotl,qlora]", and check them '
        "with: deft doctor"
    ) from error

__all__ = ["DEFTPlugin"]
