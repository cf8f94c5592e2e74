"""Images: CIFAR-10 and its download, scikit-learn's digits, corruptions and augmentation."""
