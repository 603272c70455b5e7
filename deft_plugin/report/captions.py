"""What each figure shows, for those who do not see it, and how to read it."""

from __future__ import annotations

REGIMES = (
    "A scale of the mean focus from 0 to 1 with the paper's three regimes and your data.",
    "How to read it: the further to the right your data lies, the more settled the model is before training, on your data's answers or on "
    "others; which of the two, the mean probability of the target tells. The gates of p and DEFT keep what the model believes in either case: "
    "they leave out wrong labels, and also what is new to the model.",
)
DISTRIBUTIONS = (
    "Three histograms over tokens: probability of the target, focus, entropy.",
    "How to read it: each bar is the share of tokens in its range. A token with a probability near 0 and a focus near 1 is a conflict: the model "
    "is settled on something else than your data has. The panels do not show which tokens have both; where there are many, DEFT has many closed "
    "gates.",
)
SHARES = (
    "Bars of shares: tokens by probability of the target, and each objective's gradient by the same bands.",
    "How to read it: the first bar is how many tokens each band has; the others, how much of an objective's gradient comes from "
    "them (the tokens' gradients in the logits, their lengths added up). For its share of the tokens, nll takes most from what "
    "the model believes least; the gates of p and DEFT move the weight to the right, to what it believes more. Those of others need not.",
)
GATES = (
    "The gate of each objective over the target's probability.",
    "How to read it: the mean gate of the tokens at each probability; the band holds eight in ten of them. A wide band means "
    "that the gate depends on more than the target's probability: for DEFT, on how settled the model is.",
)
GRADIENTS = (
    "Heat maps of the mean gradient's length over probability and entropy, one for each objective.",
    "How to read it: each cell is the mean over the tokens of your sample that lie in it, from 0 to √2; grey cells have none. At the lower left "
    "are conflicts, tokens that the model is certain to be something else: nll pulls hardest there.",
)
CHANGES = (
    "Left, each token's change of probability against its change of loss; right, shares of tokens learned and forgotten by "
    "probability before.",
    "How to read it: left, tokens at the lower right were learned, those at the upper left forgotten; dotted lines mark a change of 0.1. Dots "
    "high up with hardly a change of probability are improbable tokens that became far less probable still: nll counts them, answers do not. Right, "
    "by how sure the model was of the token before; what was below 0.1 can hardly be forgotten, nor what was above 0.9 be learned.",
)
BEFORE_AFTER = (
    "Distributions of the target's probability before and after training.",
    "How to read it: left, shares of tokens in ranges of probability. Right, on logarithmic scales, the share of tokens whose probability is below "
    "a value: a line that lies higher has more tokens that the model holds to be next to impossible.",
)
TRAINING = (
    "Mean focus, probability of the target and gate over the optimizer steps.",
    "How to read it: lines are means over the training tokens of a logging window, dots over held-out rows. A focus that "
    "rises faster than the probability is a model that grows certain, of the wrong tokens too.",
)
