"""`deft benchmark`: time, peak memory and error of the loss over a language model's head, against others.

`contestants` are the formula on full logits, deft_plugin, the losses of `public_losses`, and the matrix products, which any of
them has to pay; `contestant` says what each needs to run. `job` is one measurement, `shape` a model's; `processes` runs each
contestant in a process of its own (`worker`), which `measure`s. `tables`, `figure` and `files` say what came out.

Each contestant has the same inputs: fresh hidden states for each repetition, and logits either as peaked as a trained model's
(about half of the tokens predicted with p > 0.5) or random. Time is the median over the repetitions, by CUDA events on a GPU:
training is a forward and a backward pass, evaluation a forward pass under no_grad. Memory is the peak in training, less what was
there before, gradients included: of the allocator on a GPU, of the resident set of an untouched process on a CPU. Error is that of
the gradients against a float64 run of the contestant's formula on 256 tokens. The rows of masked labels are left out by
deft_plugin, TRL and cut-cross-entropy, and computed by others. A contestant that cannot run is named with the reason.
"""
