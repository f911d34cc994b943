"""Rewards on an inference server that speaks the Open Inference Protocol.

May import scoring's errors and host.
"""
