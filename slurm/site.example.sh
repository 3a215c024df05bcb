# shellcheck shell=bash
# What is special about your centre. Copy to slurm/site.sh, take the # off the lines that fit, change their values, delete
# the rest. slurm/common.sh reads it on the first node of every job, before anything else, and lists all variables; a
# command that fails here ends the job. Your environment at sbatch comes before these values:
#   LAUNCHER=mpirun sbatch slurm/resnet18_8k.sbatch       works where the lines below say ${LAUNCHER:-...}
# Account and partition are options of sbatch: export SBATCH_ACCOUNT=..., SBATCH_PARTITION=... in your .bashrc.

#export DIST_LARS_DATA=${DIST_LARS_DATA:-/project/data/imagenet-packed}    # as compute nodes see it

# --- 1. modules, and the .venv of `make install` ----------------------------------------------------------------------
# The modules that were loaded for `make install HOROVOD_GPU_OPERATIONS=NCCL`: compiler, CUDA and Python, for .venv uses
# theirs; and the MPI only if it was built on that one (MPI_HOME=...), for otherwise .venv has its own.
#module purge
#module load gcc/12 cuda/13.0 python/3.11
#LAUNCHER=${LAUNCHER:-auto}                # srun where its PMIx works, else mpirun
#INTERFACE=ib0                             # the fast network, where nodes have several
#STAGE='$SLURM_TMPDIR'                     # packed shards go to the node's own disk first (or /local/$USER, as it is
                                          # called here); the quotes are meant
#export DIST_LARS_CACHE=/scratch/$USER     # where nodes cannot write to your home

# --- 2. a container: compute nodes without internet, a small file quota, another processor than the login node's -------
#module load apptainer
#CONTAINER=${CONTAINER:-/project/images/dist_lars.sif}
#CONTAINER_ARGS="--bind /scratch"          # more folders that jobs need, such as the one above $SLURM_TMPDIR
# Pyxis instead of Apptainer, where `srun --help` knows --container-image:
#CONTAINER=${CONTAINER:-/project/images/dist_lars.sqsh}
#CONTAINER_ARGS="--container-mounts=/scratch:/scratch"

# --- 3. Cray: its own MPI and process manager --------------------------------------------------------------------------
# Built by `make install MPI_HOME=$CRAY_MPICH_DIR HOROVOD_GPU_OPERATIONS=NCCL`.
#module load PrgEnv-gnu cray-mpich cudatoolkit
#export MPICH_GPU_SUPPORT_ENABLED=0        # NCCL carries the gradients, MPI only small messages from the host
#export LD_LIBRARY_PATH=$CRAY_LD_LIBRARY_PATH:${LD_LIBRARY_PATH:-}
#LAUNCHER=srun MPI_TYPE=cray_shasta
#INTERFACE=hsn0
