"""Generated protobuf and gRPC stubs of the ``vmferry.v1`` contract; made by ``make protos``, never edited."""
