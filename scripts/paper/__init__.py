"""The experiments of arXiv 2602.11424, from data to table: docs/paper.md has the commands in their order.

`experiments.py` is the one place for what the authors set; `prepare.py` writes the training data, `train.py` trains with
TRL (axolotl_configs/paper-*.yaml do with Axolotl), `evaluate.py` asks a model the benchmarks' questions, `table.py` makes
the paper's table of the answers.
"""
