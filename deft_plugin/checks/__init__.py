"""What is looked at once: before training the model's weights and the tokens of the data sets, then the first batch."""

from .batch import check_batch
from .data import check_data, check_rows, data_sets_of, stored_columns
from .token_counts import TokenCounts, count_tokens
from .vocabulary import check_has_tokens, check_tokenizer, tokenizer_of
from .weights import check_modules_to_save, check_weights

__all__ = [
    "TokenCounts",
    "check_batch",
    "check_data",
    "check_has_tokens",
    "check_modules_to_save",
    "check_rows",
    "check_tokenizer",
    "check_weights",
    "count_tokens",
    "data_sets_of",
    "stored_columns",
    "tokenizer_of",
]
