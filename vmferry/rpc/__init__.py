"""gRPC at the edge: servers, interceptors, and the catalogue of errors on the wire."""
