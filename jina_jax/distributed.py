"""Several processes as one job, with the engine that JAX has."""

import re

import jax


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> tuple[int, int]:
    """Join the other processes of this job, before anything else is done with JAX.

    Args:
        coordinator: Address "host:port" of the first process, on which it listens. None lets `jax.distributed` find
            Slurm, Open MPI, Kubernetes (GKE) and Cloud TPU by themselves.
        num_processes: Number of processes.
        process_id: Number of this one, from 0.

    Returns:
        This process's number, and the number of processes: 0 and 1 where there is nothing to join.

    Raises:
        ValueError: If some of the three are given and others missing, or the number is out of range.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"coordinator, num_processes and process_id belong together; missing: {', '.join(missing)}")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"{process_id=} must be at least 0 and less than {num_processes=}")
    if not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(coordinator, num_processes, process_id)
        except (ValueError, RuntimeError) as error:
            # No cluster is found; or JAX is in use already, which no process is that a cluster has just started.
            if coordinator is None and re.search("coordinator_address|must be called before", str(error)):
                return 0, 1
            raise
    return jax.process_index(), jax.process_count()
