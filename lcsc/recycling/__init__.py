"""What turns one trained network into another: functions of the tensors of single layers, and whom they fit."""
