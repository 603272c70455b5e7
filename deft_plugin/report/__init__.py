"""`deft report`: what the gates do to your data, as one page.

A model and a data set go in; where the data stands for the model, which tokens each objective would silence, what a training run
has changed, and several runs side by side come out. From rows to page, one idea a file: `data` and `rows` (what a
trainer would train on), `checkpoint` and `measurement` (what a model makes of it), `text`, `analysis`, `silenced`, `changes` and
`runs` (numbers), `figures`, `export` and `page`, `report` (all of it in order).
"""

# What it needs, of the extra `report`.
PACKAGES = ("datasets", "jinja2", "matplotlib", "peft", "trl")
