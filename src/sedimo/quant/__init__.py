"""Number formats, quantizers, packing, and the packed tensor."""
