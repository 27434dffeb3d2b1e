"""One file an op: the maths, a reference in plain torch, the public function."""
