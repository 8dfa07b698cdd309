/** The fields of the forms: sliders, numbers, and a choice of two or three words. */
import * as React from 'react';

/** A number between two others, with its value. */
export function Slider(props: {
  label: string;
  min: number;
  max: number;
  step: number;
  value: number;
  onValue: (value: number) => void;
}): JSX.Element {
  const { min, max, step, value } = props;
  return (
    <label className="jp-Tuft-slider">
      {props.label}
      <input
        type="range"
        min={min}
        max={max}
        step={step}
        value={value}
        onChange={event => props.onValue(Number(event.target.value))}
      />
      <output>{value.toFixed(2)}</output>
    </label>
  );
}

/** A whole number; null where the field is empty. */
export function WholeNumber(props: {
  label: string;
  min?: number;
  max?: number;
  placeholder?: string;
  value: number | null;
  onValue: (value: number | null) => void;
}): JSX.Element {
  // What is typed stays while it is typed: a field that refused to be empty would turn 64 after 128 into 164.
  const [typed, setTyped] = React.useState<string | null>(null);
  return (
    <label className="jp-Tuft-slider">
      {props.label}
      <input
        type="number"
        className="jp-Tuft-field"
        min={props.min}
        max={props.max}
        placeholder={props.placeholder}
        value={typed ?? props.value ?? ''}
        onChange={event => {
          const { value } = event.target;
          setTyped(value);
          props.onValue(value === '' ? null : Math.round(Number(value)));
        }}
        onBlur={() => setTyped(null)}
      />
    </label>
  );
}

/** One of a few, side by side. `words` are in the order of the buttons. */
export function Segments<T extends string>(props: {
  label: string;
  words: Record<T, string>;
  value: T;
  onValue: (value: T) => void;
}): JSX.Element {
  return (
    <div className="jp-Tuft-segments" role="group" aria-label={props.label}>
      {(Object.keys(props.words) as T[]).map(one => (
        <button
          key={one}
          type="button"
          aria-pressed={props.value === one}
          onClick={() => props.onValue(one)}
        >
          {props.words[one]}
        </button>
      ))}
    </div>
  );
}
