"""tuner: hyperparameter optimisation for transfer learning of image classifiers."""
