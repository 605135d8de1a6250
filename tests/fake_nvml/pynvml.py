"""Stands in for nvidia-ml-py in a child process: a machine as FAKE_NVML describes it in JSON.

    {"driver": "580.95", "cuda": 13000, "errors": {"nvmlInit": 12, "nvmlDeviceGetUUID:1": 15},
     "gpus": [{"uuid": ..., "bus": ..., "name": ..., "total": ..., "reserved": ..., "used": ...,
               "cc": [9, 0], "mig": null, "compute": [[pid, bytes]], "graphics": []}]}

`errors` makes a call fail with one of NVML's codes, for every GPU or for that number alone.
"""

import json
import os
from types import SimpleNamespace

NVML_ERROR_INVALID_ARGUMENT = 2
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_NO_PERMISSION = 4
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_FUNCTION_NOT_FOUND = 13
NVML_ERROR_GPU_IS_LOST = 15
NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18
NVML_ERROR_ARGUMENT_VERSION_MISMATCH = 25
NVML_DEVICE_MIG_ENABLE = 1
nvmlMemory_v2 = 0x02000028

_MACHINE = json.loads(os.environ["FAKE_NVML"])


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__(value)
        self.value = value

    def __str__(self):
        return f"NVML error {self.value}"


def _call(name, handle=None):
    errors = _MACHINE.get("errors", {})
    code = errors.get(name, errors.get(f"{name}:{handle}"))
    if code is not None:
        raise NVMLError(code)
    return None if handle is None else _MACHINE["gpus"][handle]


def nvmlInit():
    _call("nvmlInit")


def nvmlShutdown():
    _call("nvmlShutdown")


def nvmlSystemGetDriverVersion():
    _call("nvmlSystemGetDriverVersion")
    return _MACHINE.get("driver", "580.95.05")


def nvmlSystemGetCudaDriverVersion_v2():
    _call("nvmlSystemGetCudaDriverVersion_v2")
    return _MACHINE.get("cuda", 13000)


def nvmlDeviceGetCount():
    _call("nvmlDeviceGetCount")
    return len(_MACHINE.get("gpus", []))


def nvmlDeviceGetHandleByIndex(number):
    _call("nvmlDeviceGetHandleByIndex", number)
    return number


def nvmlDeviceGetUUID(handle):
    return _call("nvmlDeviceGetUUID", handle)["uuid"]


def nvmlDeviceGetName(handle):
    return _call("nvmlDeviceGetName", handle)["name"]


def nvmlDeviceGetPciInfo(handle):
    # Bytes, as the real library leaves strings inside of structures.
    return SimpleNamespace(busId=_call("nvmlDeviceGetPciInfo", handle)["bus"].encode())


def nvmlDeviceGetCudaComputeCapability(handle):
    return tuple(_call("nvmlDeviceGetCudaComputeCapability", handle)["cc"])


def nvmlDeviceGetMigMode(handle):
    mode = _call("nvmlDeviceGetMigMode", handle)["mig"]
    if mode is None:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return [mode, mode]


def nvmlDeviceGetMemoryInfo(handle, version=None):
    gpu = _call("nvmlDeviceGetMemoryInfo", handle)
    total, reserved, used = gpu["total"], gpu["reserved"], gpu["used"]
    free = total - reserved - used
    if version is None:
        return SimpleNamespace(total=total, free=free, used=used + reserved)
    _call("nvmlDeviceGetMemoryInfo_v2", handle)
    return SimpleNamespace(total=total, reserved=reserved, free=free, used=used)


def nvmlDeviceGetComputeRunningProcesses(handle):
    return _processes(_call("nvmlDeviceGetComputeRunningProcesses", handle)["compute"])


def nvmlDeviceGetGraphicsRunningProcesses(handle):
    return _processes(_call("nvmlDeviceGetGraphicsRunningProcesses", handle)["graphics"])


def _processes(found):
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in found]
