"""Images in, tensors out: sources find images, splits cut them, the store decodes them once, augment varies them."""
