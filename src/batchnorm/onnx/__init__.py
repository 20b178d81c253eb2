"""ONNX files: records of their batch norms."""

from .records import network_of_onnx as network_of_onnx

__all__ = ["network_of_onnx"]
