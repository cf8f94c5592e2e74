"""Converts weights of PyTorch and Keras to Flax variables and back: batch norms, convolutions and dense layers.

``from_torch``, ``to_torch``, ``from_keras`` and ``to_keras`` convert models; a :class:`Layout` converts one layer:

=========================  ==========================  =============================  =============================
layout                     Flax                        PyTorch                        Keras
=========================  ==========================  =============================  =============================
``batch_norm_layout``      scale, bias,                weight, bias, running_mean,    gamma, beta, moving_mean,
                           mean, var, steps            running_var,                   moving_variance
                                                       num_batches_tracked
``conv_layout``            ``[*k, in/groups, out]``    ``[out, in/groups, *k]``       ``[*k, in/groups, out]``
``depthwise_conv_layout``  ``[*k, 1, in*multiplier]``  ``[in*multiplier, 1, *k]``     ``[*k, in, multiplier]``
``conv_transpose_layout``  ``[*k, in, out]``           ``[in, out, *k]``, k reversed  ``[*k, out, in]``, k reversed
``dense_layout``           ``[in, out]``               ``[out, in]``                  ``[in, out]``
=========================  ==========================  =============================  =============================

Values are only moved, so gradients and momenta convert like the parameters.  If Flax's batch norm lacks the scale or
bias that PyTorch has, a scale of 1 or a bias of 0 is written, but only for layers with statistics, which gradients and
momenta do not have.  Flax variables may be boxed, as by ``nn.Partitioned``.  Results are new, unboxed NumPy arrays, and
bfloat16, which NumPy lacks, becomes float32.  Settings are not part of the weights, and have different defaults:

=======================  =====================  =========================================  =====================
setting                  Flax                   PyTorch                                    Keras 3
=======================  =====================  =========================================  =====================
momentum                 0.99 of the old value  0.1 of the NEW value                       0.99 of the old value
epsilon                  1e-5                   1e-5                                       1e-3
running variance         biased                 unbiased                                   biased
padding with strides     "SAME", ``padding=1``  ``padding=1``, not Flax's "SAME"           "same" is Flax's "SAME"
=======================  =====================  =========================================  =====================

TensorFlow 2's fused kernel, for images, kept the unbiased variance (github.com/tensorflow/tensorflow/issues/55545).
If every batch has m values per feature, multiply an average of biased variances by m/(m - 1) to get the average of
unbiased ones.
"""

from jaxbn.interop._kernel_layouts import conv_layout, conv_transpose_layout, dense_layout, depthwise_conv_layout
from jaxbn.interop._layout import Layout
from jaxbn.interop._matching import Matched, Matches, match_keras, match_torch
from jaxbn.interop._models import (
    batch_norm_options_from_torch,
    batch_norm_options_to_torch,
    from_keras,
    from_torch,
    to_keras,
    to_torch,
)
from jaxbn.interop._norm_layout import batch_norm_layout

__all__ = [
    "Layout",
    "Matched",
    "Matches",
    "batch_norm_layout",
    "batch_norm_options_from_torch",
    "batch_norm_options_to_torch",
    "conv_layout",
    "conv_transpose_layout",
    "dense_layout",
    "depthwise_conv_layout",
    "from_keras",
    "from_torch",
    "match_keras",
    "match_torch",
    "to_keras",
    "to_torch",
]
