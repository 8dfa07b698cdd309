/** The form of the playground: the prompt, and how tokens are drawn. */
import * as React from 'react';
import { IPlaygroundProps } from './playgroundstate';

type Props = Pick<IPlaygroundProps, 'view' | 'onView' | 'trans'>;

/** A message to a chat, or a text to go on with. */
export function Prompt({ view, onView, trans }: Props): JSX.Element {
  const chat = view.mode === 'chat';
  return (
    <>
      <div className="jp-Tuft-controls">
        <h3>{trans.__('Prompt')}</h3>
        <div
          className="jp-Tuft-segments"
          role="group"
          aria-label={trans.__('Kind of prompt')}
        >
          {(['chat', 'text'] as const).map(mode => (
            <button
              key={mode}
              type="button"
              aria-pressed={view.mode === mode}
              onClick={() => onView({ mode })}
            >
              {mode === 'chat' ? trans.__('Chat') : trans.__('Continue text')}
            </button>
          ))}
        </div>
      </div>
      {chat && (
        <input
          className="jp-Tuft-field"
          aria-label={trans.__('System message')}
          placeholder={trans.__('System message (optional)')}
          value={view.system}
          onChange={event => onView({ system: event.target.value })}
        />
      )}
      <textarea
        className="jp-Tuft-field"
        rows={3}
        aria-label={chat ? trans.__('Message') : trans.__('Text to continue')}
        placeholder={
          chat ? trans.__('Ask something…') : trans.__('Begin a text…')
        }
        value={view.prompt}
        onChange={event => onView({ prompt: event.target.value })}
      />
    </>
  );
}

/** Temperature and the like. */
export function Sampling({ view, onView, trans }: Props): JSX.Element {
  return (
    <>
      <label className="jp-Tuft-slider">
        {trans.__('Temperature')}
        <input
          type="range"
          min={0}
          max={2}
          step={0.05}
          value={view.temperature}
          onChange={event =>
            onView({ temperature: Number(event.target.value) })
          }
        />
        <output>{view.temperature.toFixed(2)}</output>
      </label>
      <label className="jp-Tuft-slider">
        {trans.__('Top p')}
        <input
          type="range"
          min={0.05}
          max={1}
          step={0.05}
          value={view.topP}
          onChange={event => onView({ topP: Number(event.target.value) })}
        />
        <output>{view.topP.toFixed(2)}</output>
      </label>
      <label className="jp-Tuft-slider">
        {trans.__('Tokens')}
        <input
          type="number"
          className="jp-Tuft-field"
          min={1}
          max={32768}
          value={view.maxTokens}
          onChange={event => {
            const maxTokens = Math.round(Number(event.target.value));
            if (maxTokens >= 1) {
              onView({ maxTokens });
            }
          }}
        />
      </label>
      <label className="jp-Tuft-slider">
        {trans.__('Seed')}
        <input
          type="number"
          className="jp-Tuft-field"
          placeholder={trans.__('random')}
          value={view.seed ?? ''}
          onChange={event => {
            const { value } = event.target;
            onView({ seed: value === '' ? null : Math.round(Number(value)) });
          }}
        />
      </label>
    </>
  );
}
