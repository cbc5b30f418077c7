"""Scheduled Events: what a guest is told about interruptions, compatible with Azure's metadata service.

Pure: what an event may do, which document follows from it and which answer a request gets. No I/O, no clock; whoever
calls says what time it is.
"""
