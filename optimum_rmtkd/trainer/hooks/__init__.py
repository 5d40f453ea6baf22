"""What `RMTKDMixin` is made of: the hooks of `transformers.Trainer`, and what they mean for a run. Only this room and
`mixin.py` know them."""
