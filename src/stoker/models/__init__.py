"""Folders of weights, and `ArchSpec` to `nn.Decoder`."""
