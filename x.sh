# usage: x.sh core name args
core=$1; name=$2; shift 2
cd /tmp/S7; . /work/env.sh; export PYTHONPATH=/tmp/S7
exec taskset -c $core python /tmp/S/exp.py "$@" > /tmp/S7/$name.log 2>&1
