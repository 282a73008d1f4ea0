# Completion of gpuswitchctl for bash: the command itself says what a word may become.

_gpuswitchctl() {
    # Not COMP_WORDS: bash breaks words at : and =, which addresses and options have in them.
    local line=${COMP_LINE:0:COMP_POINT} words current candidate
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current=${words[-1]}
    COMPREPLY=()
    while IFS=$'\t' read -r candidate _; do
        if [[ $candidate == :files ]]; then
            compopt -o default
        else
            COMPREPLY+=("$candidate")
        fi
    done < <("$1" __complete "${words[@]:1}" 2>/dev/null)

    # bash replaces what follows the last of its breaks, so what stands before that is left out.
    local kept=$current
    while [[ $kept && ($kept != *[:=] || $COMP_WORDBREAKS != *"${kept: -1}"*) ]]; do
        kept=${kept%?}
    done
    COMPREPLY=("${COMPREPLY[@]#"$kept"}")
}
complete -F _gpuswitchctl gpuswitchctl
