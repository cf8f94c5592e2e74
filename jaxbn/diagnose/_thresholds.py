"""All thresholds of the diagnosis, with the reasons for their values.

Numbers that are called measured are those of tests/diagnose/test_thresholds.py, which measures them again, in a small
network trained on handwritten digits (batches of 32), in single layers, and in untrained networks with inputs far from
0.  The other thresholds are chosen.
"""

from statistics import NormalDist

# Shifted inputs: gap between the outputs with the running statistics and with those of the data, in standard deviations
# of the output.  Measured: below 0.05 in a healthy network, above 0.6 with images inverted or at half the contrast.
GAP = 0.3
# ... and in standard errors, since few examples differ from the running statistics by chance.  Chosen.
ERRORS = 3

# Too few values: 1/noise^2, the number of independent values whose mean is as exact as that of a batch.  Below 20, the
# mean of a batch is off by more than 0.22 standard deviations.  Measured: above 300 after convolutions; in a dense
# layer above 30 with 32 examples, and below 17 with 16.
INDEPENDENT_VALUES = 20
# In a shallow convolutional network, 2 images pass for more than 22 independent values (measured).  Even so, each of
# them decides about the output of the other.  Chosen after Wu and He 2018 (arXiv:1803.08494, section 4.1): on ImageNet,
# the error of batch norm grows by 1 point with 8 images per device instead of 32, by 4 with 4, and by 11 with 2.
FEW_EXAMPLES = 4

# Dependent batches: variance of their means, over that of independent examples.  Measured: below 1.3 in shuffled data,
# above 4 in data sorted by class.
EXCESS = 3.0
# ... and as a standard normal deviate, with one false alarm in 10,000.  From two batches the excess may reach 3 by
# chance.  Measured: below 2 then, above 5 in sorted data.
SCORE = NormalDist().inv_cdf(1 - 1e-4)

# Averages not converged: part of the squared gaps that the start explains.  Measured: above 0.99 where the weights stay
# as they are while the averages are taken.  Chosen far lower, since in training the weights move.
EXPLAINED = 0.3
# ... and the gap that it explains, in standard deviations of the output.  Measured: below 0.01 in a healthy network,
# above 0.2 after up to 15 steps at momentum 0.9.
EXPLAINED_GAP = 0.1
# ... and in standard errors.  Measured: below 0.5 in a healthy network, above 10 after up to 15 steps.
ERRORS_OF_START = 2

# Dead features: variance and scale relative to the 0.9 quantile of the layer's features, so that neither a large
# epsilon nor a residual branch whose scales start at 0 makes a layer dead.  Measured: variances above 0.1 and scales
# above 0.3 in a healthy network; 0 for features without weights or scale.
DEAD_VAR = 1e-6
DEAD_SCALE = 1e-4
# Active values that the running statistics lead us to expect of a feature, before it is called dead for having none.
# Chosen: if activity is rare and independent, there is none with probability exp(-20).
ACTIVE_VALUES = 20

# Examples, or degrees of freedom, below which a variance is not estimated.  Chosen.
EXAMPLES = 8
