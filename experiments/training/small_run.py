"""The training run of the demos: a small network on a fifth of CIFAR-10, or on scikit-learn's digits."""

from pathlib import Path

from experiments.config import Config
from experiments.data import datasets
from experiments.data.cifar10 import find_cifar10
from experiments.data.datasets import Dataset

TEST_IMAGES = 2000  # at most, so that several evaluations per epoch stay cheap
# In both runs, the last epoch has a tenth of the learning rate, which smooths the end of the curves.
CONFIGS = {
    "cifar10": Config(
        data="cifar10",
        image_size=16,
        train_images=10_000,
        augment=False,
        net="cnn7",
        batch_size=100,
        epochs=4,
        lr_decay_epochs=4,
        evaluations=4,
    ),
    "digits": Config(data="digits", image_size=16, augment=False, net="cnn7", batch_size=50, epochs=10, evaluations=2),
}


def choose_data(data_dir: Path | None) -> tuple[Dataset, str]:
    """Returns the demo's images, and a sentence about their choice."""
    if find_cifar10(data_dir):
        name, reason = "cifar10", "The demo scales its images down to 16x16 pixels and uses a fifth of them."
    else:
        name = "digits"
        reason = "CIFAR-10 was not found, and the demo downloads nothing; set --data-dir or CIFAR10_DIR to use it."
    config = CONFIGS[name]
    dataset = datasets.load(
        name, image_size=config.image_size, train_images=config.train_images, data_dir=data_dir, download=False
    )
    return datasets.first_tests(dataset, TEST_IMAGES), reason
