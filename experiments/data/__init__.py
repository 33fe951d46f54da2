"""Images on their way to a model: data sets, their order, augmentation and batches."""
